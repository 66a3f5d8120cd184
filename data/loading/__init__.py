"""Who fetches what, and when: order, worker processes, batches."""
