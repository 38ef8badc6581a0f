"""The one actor that owns an instance: checkpoints desired state, reconciles, publishes snapshots."""
