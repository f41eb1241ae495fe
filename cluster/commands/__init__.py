"""What `derm-cds` can do: one file a group of commands."""
