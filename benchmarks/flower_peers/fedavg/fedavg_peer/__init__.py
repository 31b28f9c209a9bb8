"""Flower's FedAvg on the Message API: no privacy at all, one exchange a round."""
