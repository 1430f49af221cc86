"""The audit: does a predicted adapter beat what is simpler, and is it more than a copy?"""
