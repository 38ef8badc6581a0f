"""From a caller to a replica: handles, the router that picks a replica, and the exchange of one request."""
