"""What carries the messages between the ServerApp and the ClientApps."""
