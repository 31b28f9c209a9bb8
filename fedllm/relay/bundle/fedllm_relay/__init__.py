"""The two ends of the Flower relay: they forward bytes and know nothing of what the bytes say."""
