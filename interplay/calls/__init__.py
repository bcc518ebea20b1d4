"""The calls of the client, by the resources that they concern; interplay/client.py joins them."""
