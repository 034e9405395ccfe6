"""Defines the decoder once for all back ends, and computes the tables of the rotary embedding."""
