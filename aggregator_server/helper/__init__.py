"""The second operator's program: knows the masks, never an update. Import its modules by name."""
