"""Millrace: streaming time-series forecasting on Kafka."""
