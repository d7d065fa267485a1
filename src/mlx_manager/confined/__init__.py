"""Work that may never end, or take all memory, in a process that can be ended: a native call cannot be stopped from inside its thread."""
