"""The link between processes: frames over a Unix or TCP socket, one write a loop tick and side."""
