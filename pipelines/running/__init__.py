"""What every long run needs: its folder, processes, checkpoints, metrics, progress, interrupts."""
