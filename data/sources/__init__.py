"""Where images come from: folders, archives, other libraries, caches."""
