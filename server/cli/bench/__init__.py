"""`steerserve bench`: what steering costs on a running server, measured over HTTP."""
