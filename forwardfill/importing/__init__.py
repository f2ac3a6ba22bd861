"""`forwardfill import`: vectors from files into a gallery of a running service, over REST."""
