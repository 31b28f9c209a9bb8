"""The endpoint: an OpenAI-compatible server of many adapter versions on one base model."""
