"""From other libraries' models and caches to the names of this one."""
