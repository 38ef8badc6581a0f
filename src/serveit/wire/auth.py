"""Who may speak on a channel: peer uids on Unix sockets, mutual challenge and response over TCP."""
