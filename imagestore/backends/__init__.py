"""Where objects lie: directories, S3, web servers, and wrappers around them."""
