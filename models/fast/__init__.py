"""The same functions in less time or memory, attached from outside."""
