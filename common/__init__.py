"""What every script is measured with: environments, frozen encoders, replay, logs, checkpoints."""
