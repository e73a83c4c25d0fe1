"""`make chaos`: what clients see while engines are killed."""
