"""Define the decoder once for all back ends, and compute the tables of the rotary embedding."""
