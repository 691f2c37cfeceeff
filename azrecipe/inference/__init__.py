"""A finished model generates text, chats and serves."""
