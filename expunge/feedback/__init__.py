"""What people say of pictures, yes or no, and the soft token that it makes."""
