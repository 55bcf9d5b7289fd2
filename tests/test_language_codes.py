"""Every code of FLORES-200, Wikipedia and URIEL has one tag, or is refused with a reason."""

from collections import defaultdict

import pytest

from clustering import codes, languages, uriel
from clustering.errors import UserError

_FLORES = """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn amh_Ethi apc_Arab
arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn
bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn
bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn
dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn fij_Latn
fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gaz_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr
hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn
isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor
kaz_Cyrl kbp_Latn kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kmr_Latn knc_Arab
knc_Latn kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn
lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab min_Latn
mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn
nus_Latn nya_Latn oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn pbt_Arab pes_Arab plt_Latn pol_Latn
por_Latn prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Olck scn_Latn shn_Mymr
sin_Sinh slk_Latn slv_Latn smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srd_Latn srp_Cyrl
ssw_Latn sun_Latn swe_Latn swh_Latn szl_Latn tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl
tgl_Latn tha_Thai tir_Ethi tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng
uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr
yor_Latn yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
"""

_WIKIPEDIA = """
aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb
ba ban bar bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm
bug bxr ca cbk-zam cdo ce ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq
dsb dtp dty dv dz ee el eml en eo es et eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga
gag gan gcr gd gl glk gn gom gor got gpe gu guc gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy
hyw hz ia iba id ie ig igl ii ik ilo inh io is it iu ja jam jbo jv ka kaa kab kbd kbp kcg kg kge
ki kj kk kl km kn knc ko koi kr krc ks ksh ku kus kv kw ky la lad lb lbe lez lfn lg li lij lld lmo
ln lo lrc lt ltg lv mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mnw mo mos mr mrj ms mt mus
mwl my myv mzn na nah nap nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny oc olo om
or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rki rm rmy rn ro roa-rup
roa-tara rsk ru rue rw sa sah sat sc scn sco sd se sg sh shi shn si simple sk skr sl sm smn sn so
sq sr srn ss st stq su sv sw syl szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tpi tr
trv ts tt tum tw ty tyv udm ug uk ur uz ve vec vep vi vls vo wa war wo wuu xal xh xmf yi yo za zea
zgh zh zh-classical zh-min-nan zh-yue zu
"""

FLORES_200, WIKIPEDIA = _FLORES.split(), _WIKIPEDIA.split()


def _grouped(given):
    """Tag -> its codes, and code -> why it is refused."""
    found, refused = defaultdict(list), {}
    for code in given:
        try:
            found[languages.canonical(code)].append(code)
        except UserError as error:
            refused[code] = str(error)
    return found, refused


def _collisions(found):
    return {tag: written for tag, written in found.items() if len(written) > 1}


def test_the_204_codes_of_flores_200_are_204_languages():
    assert len(set(FLORES_200)) == 204
    tags = languages.canonical_all(FLORES_200)
    assert len(set(tags)) == 204
    assert languages.canonical_all(tags) == tags


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("kor_Hang", "ko"),
        ("hau_Latn", "ha"),
        ("jpn_Jpan", "ja"),
        ("zho_Hans", "zh"),
        ("zho_Hant", "zh-Hant"),
        ("azj_Latn", "az"),
        ("azb_Arab", "azb"),
        ("uzn_Latn", "uz"),
        ("khk_Cyrl", "mn"),
        ("kmr_Latn", "ku"),
        ("tgl_Latn", "fil"),
        ("als_Latn", "sq"),
        ("aka_Latn", "ak"),
        ("twi_Latn", "tw"),
        ("arb_Arab", "ar"),
        ("arb_Latn", "ar-Latn"),
        ("acm_Arab", "acm"),
        ("kas_Arab", "ks"),
        ("kas_Deva", "ks-Deva"),
        ("knc_Latn", "kr"),
        ("knc_Arab", "kr-Arab"),
        ("nob_Latn", "no"),
        ("nno_Latn", "nn"),
        ("pbt_Arab", "pbt"),
        ("prs_Arab", "fa-AF"),
        ("srp_Cyrl", "sr"),
        ("yue_Hant", "yue"),
        ("ydd_Hebr", "yi"),
    ],
)
def test_a_flores_code_is_the_tag_without_the_usual_script(code, tag):
    assert languages.canonical(code) == tag


def test_only_old_and_new_names_of_one_wikipedia_meet():
    found, refused = _grouped(WIKIPEDIA)
    print("Wikipedia:", _collisions(found))
    assert _collisions(found) == {
        "be-tarask": ["be-tarask", "be-x-old"],
        "kr": ["knc", "kr"],
        "ro": ["mo", "ro"],
    }
    # Rusyn of Pannonia has had a code since 2022, which langcodes 3.5 does not know.
    assert set(refused) == {"als", "nrm", "rsk"}
    assert "gsw (Alemannic" in refused["als"] and "sq (Tosk Albanian" in refused["als"]
    assert "nrf (Norman" in refused["nrm"] and "nrm-Latn (Narom" in refused["nrm"]


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("bat-smg", "sgs"),
        ("be-x-old", "be-tarask"),
        ("bh", "bho"),
        ("cbk-zam", "cbk"),
        ("eml", "egl"),
        ("x-eml", "egl"),
        ("fiu-vro", "vro"),
        ("map-bms", "jv-x-bms"),
        ("mo", "ro"),
        ("nah", "nah"),
        ("nds-nl", "nds-NL"),
        ("no", "no"),
        ("roa-rup", "rup"),
        ("roa-tara", "nap-x-tara"),
        ("sh", "sr-Latn"),
        ("simple", "en-simple"),
        ("zh-classical", "lzh"),
        ("zh-min-nan", "nan"),
        ("zh-yue", "yue"),
        ("zh_min_nan", "nan"),
    ],
)
def test_an_old_code_of_wikipedia_is_its_language(code, tag):
    assert languages.canonical(code) == tag
    assert languages.canonical(tag) == tag


def test_codes_of_uriel_meet_only_as_names_of_one_language():
    given = sorted(uriel._read("geo")[1])
    assert len(given) > 7900
    found, refused = _grouped(given)
    print("URIEL:", _collisions(found))
    members = codes.usual_members()
    others = {"alb": "sq", "drw": "fa-AF", "eml": "egl", "fil": "fil", "gre": "el"}
    for tag, written in _collisions(found).items():
        known = languages.iso639_3(tag)
        assert all(code in known or others.get(code) == tag for code in written), tag
    # One macrolanguage and its usual member, or codes that ISO 639-3 has merged since.
    assert _collisions(found)["zh"] == ["cmn", "zho"]
    assert _collisions(found)["ku"] == ["kmr", "kur"]
    assert _collisions(found)["no"] == ["nob", "nor"]
    assert "ak" not in _collisions(found) and "tw" not in members
    assert {"als", "mis", "mul", "nrm", "und", "zxx"} <= set(refused)
    # The others have been withdrawn from ISO 639-3.
    unknown = [code for code, why in refused.items() if "unknown language code" in why]
    assert len(unknown) == len(refused) - 6 == 31


def test_every_tag_is_its_own_tag():
    given = [*FLORES_200, *WIKIPEDIA, *uriel._read("geo")[1]]
    tags = _grouped(given)[0]
    assert {tag: languages.canonical(tag) for tag in tags} == {tag: tag for tag in tags}
    assert len(tags) > 7800
