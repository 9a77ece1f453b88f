"""The exchanges between ranks, and the errors that travel through them."""
