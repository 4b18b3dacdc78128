"""A TFDS data set as it lies on a disk."""


def stored(folder, name, features, splits):
    import tensorflow_datasets as tfds

    methods = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        ),
        "_split_generators": lambda self, _: {
            split: enumerate(rows) for split, rows in splits.items()
        },
        "_generate_examples": lambda self: None,
    }
    tfds.disable_progress_bar()
    with tfds.core.registered.skip_registration():
        builder = type(
            name, (tfds.core.GeneratorBasedBuilder,), {**methods, "__module__": __name__}
        )
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
