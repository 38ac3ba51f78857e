"""Plain networks, which know nothing of memory."""
