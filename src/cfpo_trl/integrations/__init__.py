"""The same objective in other engines, without forks."""
