"""Adapters to the broker: the only place that imports a Kafka client."""
