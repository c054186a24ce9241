"""What if: the core's own scheduler, pool and policies under a virtual clock, on a trace."""
