"""What trains and is measured: optimizer, schedule, losses, precision, evaluation, records."""
