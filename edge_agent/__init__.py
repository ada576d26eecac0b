"""The volunteer's program: reads instructions that stay on this machine, trains, sends updates."""
