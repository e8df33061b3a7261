"""What happens in a forward of an attached model: which prefix each row reads, and the hooks that hand it over."""
