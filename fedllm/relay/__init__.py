"""How sealed envelopes travel between coordinator and owners; what they say is none of this package's business."""
