random_uuid = None
