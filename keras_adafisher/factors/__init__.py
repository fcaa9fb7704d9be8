"""The running Kronecker factors that an optimizer keeps."""
