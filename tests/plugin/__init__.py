"""The plugin, in real pytest runs."""
