"""From a name or a text to a value: the catalog of plugins, the loader, overrides."""
