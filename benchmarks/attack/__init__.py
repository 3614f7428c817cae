"""Hostile requests and unfair clients, with a probe stream beside them."""
