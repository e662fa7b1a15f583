"""A sample partner API: plans for a vehicle, by its VIN. It stands behind a gate and knows nothing of credentials.

A search, whole: ``app.PlansApi.search`` → ``search.read_search`` → ``vehicles.describe`` and ``pricing.price_plans``.
The tables are ``makers``, ``states`` and ``catalogue``.
"""
