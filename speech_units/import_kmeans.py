"""Take over somebody else's k-means: a scikit-learn model (joblib or pickle), or an array of centroids (.npy).

Usage: python speech_units/import_kmeans.py --kmeans hubert_large_ll60k_L22_km5000.bin --trust_pickle true \\
           --encoder facebook/hubert-large-ll60k --layer 22 --output_dir runs/kmeans

Reads: what fairseq's learn_kmeans.py writes and SpireLM, textlesslib and slamkit read, a joblib of scikit-learn's
MiniBatchKMeans or KMeans; or (num_units, dim) as .npy.
Writes, in output_dir: kmeans.safetensors and features.json, as fit_kmeans.py does.

A k-means file does not say which features its centroids belong to; --encoder and --layer must. Layers are counted from
1, and a layer's output is taken without the norm that a large HuBERT has after its last layer. So it is elsewhere:
- fairseq: `output_layer` "is 1-based", and the encoder leaves its last norm out where a layer is asked for
  (fairseq/models/hubert/hubert.py, forward; fairseq/models/wav2vec/wav2vec2.py, TransformerEncoder.forward).
  dump_hubert_feature.py hands its `layer` on as it is: L9 in hubert_base_ls960_L9_km500.bin is --layer 9.
- textlesslib hands its layer to the same function (textless/data/hubert_feature_reader.py).
- SpireLM keeps `encoder.layers[:layer]` of transformers' model and takes the norm out.
- slamkit takes transformers' `hidden_states[layer]`, of which number 0 is the first layer's input; the same, but for a
  large HuBERT's last layer, to which transformers applies the norm.

Whether the waveform is brought to mean 0 and variance 1, an utterance at a time, is what the model's
preprocessor_config.json says (do_normalize), and yes where there is none; --normalise says otherwise. SpireLM does it.
fairseq and textlesslib go by how the model was trained: hubert_large_librivox.yaml says `normalize: true`,
hubert_base_librispeech.yaml false. slamkit never does it. A base
HuBERT's first convolution has no bias and a norm over the utterance after it, so that a constant factor or offset
matters little there, unless the audio is very quiet: expect units that are nearly theirs. fairseq and textlesslib cut
audio every 100 s, and slamkit adds 40 zeros at both ends; neither is done here.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

from speech_units.features import NUM_MFCC, FeatureConfig, encoder_config, features_json
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, write_json
from towerspeech.stage import stage
from towerspeech.units import MAX_NUM_UNITS

NPY = b"\x93NUMPY"  # how a .npy file begins, whatever its name
SAVE_AS_NPY = "numpy.save('centroids.npy', joblib.load('km.bin').cluster_centers_)"


def read_centroids(path: Path, trust_pickle: bool):
    """Read what may be centroids: an array of any kind and shape.

    Raises:
        UserError: It is neither .npy nor (if these are trusted) joblib or pickle, or holds something else.
    """
    import numpy as np

    check_exists(path, "check --kmeans")
    if path.is_dir():
        raise UserError(f"{path} is a folder, but a file is wanted", "name the joblib, pickle or .npy file")
    with open(path, "rb") as file:
        is_npy = file.read(len(NPY)) == NPY
    if is_npy:
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as error:  # it is cut off, or an array of Python objects, which would be pickled
            raise UserError(f"{path} cannot be read: {error}", f"save the array alone: {SAVE_AS_NPY}") from None
    if not trust_pickle:
        raise UserError(
            f"{path} is no .npy, so it would be read as a pickle: loading one runs whatever code was put into it",
            f"if you trust who made it, add --trust_pickle true; or make a .npy of it elsewhere: {SAVE_AS_NPY}",
        )
    import joblib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn's version: only an array is taken
            model = joblib.load(path)
    except Exception as error:  # what a pickle raises can be anything
        raise UserError(
            f"{path} cannot be loaded as joblib or pickle: {type(error).__name__}: {str(error) or 'it is damaged'}",
            f"where it can (an old one with its own scikit-learn), run {SAVE_AS_NPY}",
        ) from None
    centroids = getattr(model, "cluster_centers_", model)
    if not isinstance(centroids, np.ndarray):
        raise UserError(
            f"{path} holds a {type(model).__name__}, neither an array nor a fitted k-means with cluster_centers_",
            "name the k-means' own file",
        )
    return centroids


def check_centroids(path: Path, found, dim: int, model: str):
    """Give centroids as they are kept, float32 (num_units, dim).

    Raises:
        UserError: They are not a table of finite numbers, too few or too many, or not as wide as the features.
    """
    import numpy as np

    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise UserError(
            f"{path} holds an array of shape {found.shape} and type {found.dtype}, no centroids",
            "a table of numbers is wanted, (num_units, dim)",
        )
    with np.errstate(over="ignore"):
        centroids = np.ascontiguousarray(found, dtype=np.float32)
    if not 2 <= len(centroids) <= MAX_NUM_UNITS:
        raise UserError(
            f"{path} has {len(centroids):,} centroids", f"2 to {MAX_NUM_UNITS:,} units have a character each"
        )
    if centroids.shape[1] != dim:
        raise UserError(
            f"{path} has centroids of {centroids.shape[1]} numbers, but {model} gives {dim}",
            "check --features and --encoder (39 numbers are other MFCC than ours, such as fairseq's: fit anew)",
        )
    bad = ~np.isfinite(centroids).all(axis=1)
    if bad.any():
        raise UserError(f"{path}: centroid {bad.argmax()} holds NaN, or what float32 cannot", "get the whole file")
    return centroids


def import_kmeans(
    kmeans: Path,
    output_dir: Path,
    features: Literal["mfcc", "hubert", "wav2vec2", "wavlm"] = "hubert",
    encoder: str = "facebook/hubert-large-ll60k",
    layer: int = 22,
    normalise: bool | None = None,
    trust_pickle: bool = False,
    overwrite: bool = False,
) -> None:
    """Turn a k-means of scikit-learn, or centroids as .npy, into a k-means folder.

    Args:
        kmeans: The file: .npy, or joblib or pickle of a (MiniBatch)KMeans or of its centroids.
        output_dir: Folder to write.
        features: What was clustered: mfcc (as features.py computes them, no others), hubert, wav2vec2 or wavlm.
        encoder: Model that it was clustered from: hub name or folder.
        layer: Layer whose output was clustered, counted from 1.
        normalise: Whether utterances were brought to mean 0 and variance 1; default: as the model's folder says.
        trust_pickle: Load a file that is no .npy. Whatever code was put into it runs: only from who you trust.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    import numpy as np

    found = read_centroids(kmeans, trust_pickle)
    if features == "mfcc":
        config, dim, model = FeatureConfig("mfcc"), 2 * NUM_MFCC, "our MFCC"
    else:
        from transformers import AutoConfig

        config = encoder_config(features, encoder, layer)
        config = config if normalise is None else replace(config, normalise=normalise)
        dim, model = AutoConfig.from_pretrained(encoder).hidden_size, encoder
    centroids = check_centroids(kmeans, found, dim, model)
    distinct = len(np.unique(centroids, axis=0))
    with stage(__file__, output_dir, arguments, inputs=["kmeans"], ignore=["trust_pickle"]) as work:
        if work.done:
            return
        from safetensors.numpy import save_file

        with work.publish("kmeans.safetensors") as path:
            save_file({"centroids": centroids}, path)
        write_json(output_dir / "features.json", features_json(config, *centroids.shape))
        work.counts.update(units=len(centroids), distinct_units=distinct)
        print(f"{len(centroids):,} units of {dim} numbers", end="")
        print(f", of which only {distinct:,} differ: the others' ids will not occur" * (distinct < len(centroids)))
        if features != "mfcc":
            waveform = "normalised" if config.normalise else "as it is"
            print(
                f"taken to be of {encoder}, layer {layer} (counted from 1, without a last norm), waveform {waveform}"
            )
    print(output_dir)


if __name__ == "__main__":
    run(import_kmeans)
