"""Files of servers, read in ranges and kept in blocks in a local folder of bounded size."""
