"""Forecasting: NumPy and Keras. Knows no Kafka, clock, environment or file path but those handed in."""
