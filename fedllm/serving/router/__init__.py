"""Several replicas behind one OpenAI endpoint: placement, retries, limits, and aliases that flip once for all."""
