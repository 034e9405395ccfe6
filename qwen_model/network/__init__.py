"""The decoder, stated once for all back ends, and the tables of the rotary embedding."""
