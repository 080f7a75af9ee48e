"""What a network is fed and what it cares about, layer by layer: second moments over unlabelled data."""
