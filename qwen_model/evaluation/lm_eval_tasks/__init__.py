"""Hold tasks of lm-eval for the packaged model, whose data are in this package: no hub is needed."""
