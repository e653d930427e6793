"""Files that the tools themselves wrote, and the scripts that made them write."""
