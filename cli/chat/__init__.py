"""Interactive chat: conversation, line editor, slash commands and saved chats."""
