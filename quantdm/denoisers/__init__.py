"""What a denoiser is: its traced data flow, blocks and inventory."""
