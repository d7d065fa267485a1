"""One module a format; the names in each are those of `families.family.ToolFormat`."""
